/* sire_hook_probe answers argv[1]. */
#include "support.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int live = -1;
    OK(sire_hook_probe(&live));
    CHECK(live == atoi(argv[1]));
    OK(sire_hook_probe(NULL));
    return 0;
}
