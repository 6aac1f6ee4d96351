/* What clients of the control socket are refused, and how that is said: what makes no sense, what comes too early or at a bad moment, and too much at once. */
#include "support.h"
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* More than wait for the worker (64) and are with it, eight from each client as is allowed. */
enum { CLIENTS = 12, AT_ONCE = 8 };

static char socket_path[108];

static int client(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, socket_path, sizeof socket_path);
    int connection = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(connection >= 0 && connect(connection, (struct sockaddr *)&address, sizeof address) == 0);
    return connection;
}

static void say(int connection, const char *request) { CHECK(write(connection, request, strlen(request)) == (ssize_t)strlen(request)); }

/* So many lines of answers. */
static char *hear(int connection, int lines) {
    size_t length = 0, room = 1 << 22;
    char *text = malloc(room);
    CHECK(text != NULL);
    for (int heard = 0; heard < lines; heard += text[length++] == '\n') CHECK(length + 1 < room && read(connection, text + length, 1) == 1);
    text[length] = 0;
    return text;
}

static void refused(const char *request, const char *words) {
    int connection = client();
    say(connection, request);
    char *answer = hear(connection, 1);
    if (!strstr(answer, "error") || !strstr(answer, words)) fprintf(stderr, "%s was answered with %s", request, answer), exit(1);
    free(answer);
    close(connection);
}

/* What one connection may have under way, and how long it may be. */
static void too_much_of_one(void) {
    int connection = client();
    device_fault("cuMemGetInfo_v2=delay:200000; cuDeviceGetUuid_v2=delay:200000");
    char requests[(AT_ONCE + 1) * 16 + 1] = "";
    for (int i = 0; i <= AT_ONCE; i++) strcat(requests, "{\"verb\":\"list\"}\n");
    say(connection, requests);
    char *answers = hear(connection, AT_ONCE + 1);
    device_fault("");
    CHECK(strstr(answers, "8 requests of this connection are unanswered; wait for them") != NULL);
    free(answers);
    close(connection);
    char *request = malloc(8192);
    memset(request, ' ', 8192);
    memcpy(request + 8190, "\n", 2);
    refused(request, "a request has at most 4096 bytes; this one has more");
    free(request);
}

/* A socket's path is as long as the kernel lets it be. */
static void too_long_a_path(void) {
    const char *before = getenv("XDG_RUNTIME_DIR");
    char *own = strdup(before), longer[4096];
    snprintf(longer, sizeof longer, "%s/%0100d", own, 0);
    CHECK(mkdir(longer, 0700) == 0 && setenv("XDG_RUNTIME_DIR", longer, 1) == 0);
    CHECK(sire_control_open(NULL, 0, NULL) != SIRE_STATUS_OK);
    SAYS("is too long for a socket's path; set XDG_RUNTIME_DIR to a shorter one");
    CHECK(setenv("XDG_RUNTIME_DIR", own, 1) == 0);
    free(own);
}

static void too_much_at_once(void) {
    int connections[CLIENTS], full = 0;
    device_fault("cuMemGetInfo_v2=delay:200000; cuDeviceGetUuid_v2=delay:200000");
    for (int i = 0; i < CLIENTS; i++) {
        connections[i] = client();
        for (int k = 0; k < AT_ONCE; k++) say(connections[i], "{\"verb\":\"list\"}\n");
    }
    sleep(1);
    device_fault("");
    for (int i = 0; i < CLIENTS; i++) {
        char *answers = hear(connections[i], AT_ONCE);
        full |= strstr(answers, "too many questions wait for the driver; try again later") != NULL;
        free(answers);
        close(connections[i]);
    }
    CHECK(full);
}

int main(void) {
    too_long_a_path();
    OK(sire_control_open(socket_path, sizeof socket_path, NULL));
    refused("{\"verb\":\"evict\"}\n", "the program has not used a device yet");
    uint32_t region = region_of("asked", 1);
    void *memory = allocate_in(region, 2 * MiB), *stream = NULL, *graph = NULL;
    refused("{\"verb\":\"evict\",\"device\":0}\n", "evict takes a device and bytes together, or neither");
    refused("{\"verb\":\"reclaim\",\"mark\":7,\"priority\":0,\"timeout\":1}\n", "there is no mark 7; it was closed");
    CUDA(0, cudaStreamCreate(&stream));
    CUDA(0, cudaStreamBeginCapture(stream, 0));
    refused("{\"verb\":\"evict\"}\n", "a CUDA graph is being captured; try again when that is over");
    CUDA(0, cudaStreamEndCapture(stream, &graph));
    CUDA(0, cudaGraphDestroy(graph));
    CUDA(0, cudaStreamDestroy(stream));
    too_much_of_one();
    too_much_at_once();
    CUDA(0, cudaFree(memory));
    return 0;
}
