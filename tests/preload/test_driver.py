"""Driver-level hooks: who finds which function, and whose memory that makes it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMPILER, FIXTURES, ROOT, Workshop, check

WAYS = ["linked", "dlsym", "proc", "proc11", "stream"]


@pytest.fixture(scope="session")
def names_dir(workshop: Workshop) -> Path:
    """A folder whose libcuda.so.1 notes what is called."""
    options = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic")
    return workshop.fixture("libcuda.so.1", FIXTURES / "driver.c", *options, subdirectory="names").parent


def private(workshop: Workshop, way: int) -> Path:
    """A library that reaches the driver in one of the ways of fixtures/private.c."""
    options = (f"-DWAY={way}", "-shared", "-fPIC", workshop.sire_so, workshop.link_runtime)
    return workshop.fixture(f"private_{way}.so", FIXTURES / "private.c", *options, subdirectory="private")


@pytest.fixture(scope="session")
def memory(workshop: Workshop, sim_dir: Path) -> Path:
    """driver_memory.c, which links the driver too."""
    return workshop.program("driver_memory.c", f"-L{sim_dir}", "-l:libcuda.so.1")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("heard", {}),
        ("heard", {"SIRE_HOOK_MODE": "driver"}),
        ("heard", {"SIRE_DRIVER_ALLOW": "driver_na*"}),
        ("heard", {"SIRE_DRIVER_DENY": "libnccl, driver_nam"}),
        ("denied", {"SIRE_DRIVER_ALLOW": "libnccl"}),
        ("denied", {"SIRE_DRIVER_DENY": "driver_names"}),
        ("denied", {"SIRE_DRIVER_ALLOW": "driver_names", "SIRE_DRIVER_DENY": "*names"}),
        ("off", {"SIRE_DISABLE": "1"}),
        ("off", {"SIRE_HOOK_MODE": "preload"}),
        ("off", {"SIRE_HOOK_MODE": "torch"}),
    ],
)
def test_who_gets_which_function(workshop: Workshop, names_dir: Path, driver_so: Path, kind: str, settings: dict[str, str]) -> None:
    program = workshop.program("driver_names.c", runtime=False)
    done = check(workshop.run(program, kind, folders=(names_dir,), extra=settings, LD_PRELOAD=f"{driver_so} {workshop.sire_so}"))
    assert done.stderr == ""


def test_a_list_that_cannot_match_is_refused(workshop: Workshop, sim_dir: Path, memory: Path, driver_so: Path) -> None:
    settings = {"SIRE_DRIVER_DENY": "/usr/lib/libnccl.so", "LD_PRELOAD": f"{driver_so} {workshop.sire_so}"}
    done = workshop.run(memory, "dlsym", "heard", folders=(sim_dir,), extra=settings)
    assert done.returncode == 1
    assert 'SIRE_DRIVER_DENY is "/usr/lib/libnccl.so"; it must be file names' in done.stderr


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["driver first", "driver last"])
def test_memory(workshop: Workshop, sim_dir: Path, memory: Path, driver_so: Path, tmp_path: Path, way: str, order: str) -> None:
    both = [str(driver_so), str(workshop.sire_so)]
    preload = " ".join(both if order == "driver first" else reversed(both))
    settings = {"LD_PRELOAD": preload, "SIRE_SIM_MEMORY": "512MiB", "SIRE_SIM_DEVICES": "2", "SIRE_SIM_POISON": "sample", "SIRE_LOG": "error"}
    settings["TORCHTOOLS_LOCK_DIR"] = str(tmp_path)
    check(workshop.run(memory, way, "heard", folders=(sim_dir,), extra=settings))


def test_callers(workshop: Workshop, sim_dir: Path, driver_so: Path) -> None:
    program = workshop.program("callers.c", f"-L{sim_dir}", "-l:libcuda.so.1", "-lpthread")
    settings = {"LD_PRELOAD": f"{driver_so} {workshop.sire_so}", "SIRE_SIM_MEMORY": "256MiB", "SIRE_LOG": "error"}
    check(workshop.run(program, "driver", folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize("way", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["local", "global"])
def test_a_library_with_its_own_way_to_the_driver(workshop: Workshop, sim_dir: Path, memory: Path, driver_so: Path, way: int, mode: str) -> None:
    settings = {"LD_PRELOAD": f"{driver_so} {workshop.sire_so}", "SIRE_SIM_MEMORY": "512MiB", "SIRE_SIM_POISON": "sample", "SIRE_LOG": "error"}
    check(workshop.run(memory, "private", str(private(workshop, way)), mode, "heard", folders=(sim_dir,), extra=settings))
    # Without the second library nobody is heard, and all works.
    settings["LD_PRELOAD"] = str(workshop.sire_so)
    check(workshop.run(memory, "private", str(private(workshop, way)), mode, "deaf", folders=(sim_dir,), extra=settings))


def test_a_library_that_binds_to_itself_first_is_not_heard(workshop: Workshop, sim_dir: Path, memory: Path, driver_so: Path) -> None:
    # RTLD_DEEPBIND: its dlsym is the C library's. It works as without Sire.
    settings = {"LD_PRELOAD": f"{driver_so} {workshop.sire_so}", "SIRE_SIM_MEMORY": "512MiB"}
    check(workshop.run(memory, "private", str(private(workshop, 1)), "deepbind", "deaf", folders=(sim_dir,), extra=settings))


@pytest.fixture(scope="session")
def beside(workshop: Workshop, sim_dir: Path) -> Path:
    """driver_company.c."""
    return workshop.program("driver_company.c", f"-L{sim_dir}", "-l:libcuda.so.1")


def other(workshop: Workshop, style: int) -> Path:
    """Another interposer."""
    return workshop.fixture(f"company_{style}.so", FIXTURES / "company.c", f"-DSTYLE={style}", "-O2", "-shared", "-fPIC", "-ldl", subdirectory="company")


@pytest.mark.parametrize("style", [1, 2])
@pytest.mark.parametrize("order", ["other driver sire", "driver other sire", "driver sire other", "sire driver other", "sire other driver"])
def test_another_interposer(workshop: Workshop, sim_dir: Path, beside: Path, driver_so: Path, style: int, order: str) -> None:
    paths = {"other": other(workshop, style), "driver": driver_so, "sire": workshop.sire_so}
    names = order.split()
    settings = {"LD_PRELOAD": " ".join(str(paths[name]) for name in names), "SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_POISON": "sample"}
    done = check(workshop.run(beside, "company", folders=(sim_dir,), extra=settings))
    # Who comes first hears of everything; who comes later, of what the first passes on. Nobody is left out.
    before_sire = names.index("other") < names.index("sire")
    before_driver = names.index("other") < names.index("driver")
    # The other's dlsym goes straight to the C library: then Sire's is not asked, says so, and what is looked up is not Sire's.
    deaf = before_driver and style == 1
    expected = [f"live={int(not deaf)}"]
    for label, first in (("runtime", before_sire), ("linked", before_driver), ("found", before_driver)):
        owned = not (deaf and label == "found")
        expected += [f"{label} outside owned=0 heard=1", f"{label} inside owned={int(owned)} heard={int(first or not owned)}"]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("style", [1, 2])
@pytest.mark.parametrize("order", ["other sire", "sire other"])
def test_another_interposer_without_driver_level_hooks(workshop: Workshop, sim_dir: Path, beside: Path, style: int, order: str) -> None:
    paths = {"other": other(workshop, style), "sire": workshop.sire_so}
    settings = {"LD_PRELOAD": " ".join(str(paths[name]) for name in order.split()), "SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_POISON": "sample"}
    done = check(workshop.run(beside, "company", folders=(sim_dir,), extra=settings))
    # Of the runtime's calls both hear what is theirs; those of the driver are the other one's alone.
    first = order.split()[0] == "other"
    expected = ["live=0", "runtime outside owned=0 heard=1", f"runtime inside owned=1 heard={int(first)}"]
    expected += [f"{label} {where} owned=0 heard=1" for label in ("linked", "found") for where in ("outside", "inside")]
    assert done.stdout.splitlines() == expected


OTHERS = ["other sire", "other driver sire", "driver sire other", "sire driver other", "sire other driver"]


@pytest.mark.parametrize(
    ("preload", "style"), [(alone, 2) for alone in ("sire", "driver sire", "sire driver")] + [(order, style) for order in OTHERS for style in (1, 2)]
)
@pytest.mark.parametrize("how", ["handler", "destructor", "library", "closed"])
def test_the_end_of_a_process_in_every_order(workshop: Workshop, sim_dir: Path, driver_so: Path, preload: str, style: int, how: str) -> None:
    paths = {"other": other(workshop, style), "driver": driver_so, "sire": workshop.sire_so}
    library = workshop.fixture("exit.so", FIXTURES / "exit.c", "-shared", "-fPIC", "-ldl", subdirectory="exit")
    settings = {"LD_PRELOAD": " ".join(str(paths[name]) for name in preload.split()), "SIRE_SIM_MEMORY": "256MiB", "SIRE_LOG": "off"}
    for when in ("early", "late"):
        done = check(workshop.run(workshop.program("exit_order.c"), when, how, str(library), folders=(sim_dir,), extra=settings))
        assert done.stdout == "finished\n", (when, done.stdout)


def test_the_next_definition_is_the_askers(workshop: Workshop, sim_dir: Path, beside: Path, driver_so: Path) -> None:
    """A dlsym that calls the real one is taken for the asker: then each of these libraries finds itself, and calls itself until the stack ends."""
    links = [str(workshop.fixture(f"chain_{name}.so", FIXTURES / "chain.c", "-shared", "-fPIC", subdirectory="chain")) for name in "ab"]
    for preload in ([*links, driver_so, workshop.sire_so], [driver_so, workshop.sire_so, *links]):
        check(workshop.run(beside, "chain", folders=(sim_dir,), extra={"LD_PRELOAD": " ".join(map(str, preload))}))


@pytest.mark.parametrize("order", ["driver first", "driver last"])
def test_two_libraries_with_a_runtime_inside(workshop: Workshop, sim_dir: Path, beside: Path, driver_so: Path, order: str) -> None:
    both = [str(driver_so), str(workshop.sire_so)]
    settings = {"LD_PRELOAD": " ".join(both if order == "driver first" else both[::-1]), "SIRE_SIM_MEMORY": "256MiB", "SIRE_LOG": "off"}
    names = [f"copy_{number}.so" for number in (1, 2)]
    copies = [workshop.fixture(name, FIXTURES / "copy.c", "-shared", "-fPIC", workshop.sire_so, subdirectory="copies") for name in names]
    check(workshop.run(beside, "copies", *map(str, copies), folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize("ways", [(1, 2), (1, 3), (2, 3), (2, 4)])
def test_two_ways_in_one_process(workshop: Workshop, sim_dir: Path, beside: Path, driver_so: Path, ways: tuple[int, int]) -> None:
    settings = {"LD_PRELOAD": f"{driver_so} {workshop.sire_so}", "SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_POISON": "sample"}
    check(workshop.run(beside, "two", *(str(private(workshop, way)) for way in ways), folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize("ways", [(1, 2), (2, 1), (1, 3), (3, 1), (4, 1)])
@pytest.mark.parametrize("listed", ["denied", "allowed"])
def test_the_lists_tell_libraries_of_one_process_apart(
    workshop: Workshop, sim_dir: Path, beside: Path, driver_so: Path, ways: tuple[int, int], listed: str
) -> None:
    settings = {"LD_PRELOAD": f"{driver_so} {workshop.sire_so}", "SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_POISON": "sample"}
    first, second = (private(workshop, way) for way in ways)
    # The program is heard where only the second library is denied, and is not where only the first is allowed.
    settings |= {"SIRE_DRIVER_DENY": second.name} if listed == "denied" else {"SIRE_DRIVER_ALLOW": first.stem}
    check(workshop.run(beside, "lists", str(first), str(second), "1" if listed == "denied" else "0", folders=(sim_dir,), extra=settings))


@pytest.mark.parametrize("order", ["early sire", "sire early", "early driver sire", "driver sire early", "sire early driver"])
def test_a_constructor_that_allocates_before_anybody_has_asked_sire(workshop: Workshop, sim_dir: Path, beside: Path, driver_so: Path, order: str) -> None:
    library = workshop.fixture("early.so", FIXTURES / "early.c", "-shared", "-fPIC", workshop.link_runtime, subdirectory="early")
    paths, names = {"early": library, "driver": driver_so, "sire": workshop.sire_so}, order.split()
    settings = {"LD_PRELOAD": " ".join(str(paths[name]) for name in names), "SIRE_SIM_MEMORY": "256MiB", "SIRE_REGION": "whole", "SIRE_BACKUP": "cpu"}
    done = check(workshop.run(beside, "early", str(int("driver" in names)), folders=(sim_dir,), extra=settings))
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    behind = names[names.index("early") :]
    assert found["next"].startswith("libsire_driver" if "driver" in behind else "libcu"), found
    assert found["anyone"].startswith("libsire_driver" if "driver" in names else "libcu"), found
    assert found["runtime next"].startswith("libsire_alloc" if "sire" in behind else "libcu"), found


def test_many_threads(workshop: Workshop, sim_dir: Path, beside: Path, driver_so: Path) -> None:
    settings = {"LD_PRELOAD": f"{driver_so} {workshop.sire_so}", "SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_POISON": "sample", "SIRE_LOG": "off"}
    check(workshop.run(beside, "threads", folders=(sim_dir,), extra=settings))


def test_without_a_driver_there_is_none(workshop: Workshop, driver_so: Path) -> None:
    """Programs ask the global order whether there is a driver; our own exports are no answer to that."""
    script = """
import ctypes
libc, program = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
libc.dlsym.restype, libc.dlerror.restype = ctypes.c_void_p, ctypes.c_char_p
assert not hasattr(program, "cuMemAlloc_v2") and not hasattr(program, "cuGetProcAddress")
assert program.dlsym(None, b"cuMemFree_v2") in (0, None) and b"cuMemFree_v2" in libc.dlerror()
"""
    environment = workshop.environment(LD_PRELOAD=f"{driver_so} {workshop.sire_so}")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_alone_it_passes_everything_through_and_says_so(workshop: Workshop, names_dir: Path, driver_so: Path) -> None:
    script = "import ctypes; library = ctypes.CDLL('libcuda.so.1'); library.cuMemAlloc_v2; library.cuMemFree_v2; print(library.cuInit(5))"
    environment = workshop.environment(names_dir, LD_PRELOAD=str(driver_so))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "5\n")
    assert done.stderr.count("libsire_driver.so was preloaded without libsire_alloc.so") == 1


def test_python_finds_functions_by_their_names(workshop: Workshop, sim_dir: Path, driver_so: Path) -> None:
    """CuPy's and many others' way: ctypes."""
    script = """
import ctypes
driver, sire = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libsire_alloc.so")
sire.sire_owns.argtypes, sire.sire_owns.restype = [ctypes.c_void_p], ctypes.c_bool
context, region, address = ctypes.c_void_p(), ctypes.c_uint32(), ctypes.c_uint64()
assert driver.cuInit(0) == driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == driver.cuCtxSetCurrent(context) == 0
assert sire.sire_region_open(b"r", None, ctypes.byref(region)) == sire.sire_region_enter(region, 0) == 0
assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(1 << 21)) == 0
assert sire.sire_owns(address.value) and driver.cuMemFree_v2(address) == 0
"""
    environment = workshop.environment(sim_dir, LD_PRELOAD=f"{driver_so} {workshop.sire_so}", SIRE_SIM_MEMORY="256MiB", SIRE_SIM_POISON="sample")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_driver_that_is_a_loader_finds_what_is_behind_it(workshop: Workshop, sim_dir: Path, driver_so: Path) -> None:
    """WSL's is one: answered with ours, its own look-up led back to itself without end."""
    options = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic", "-ldl")
    loader = workshop.fixture("libcuda.so.1", FIXTURES / "loader.c", *options, subdirectory="loader")
    script = """
import ctypes
driver, sire = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libsire_alloc.so")
sire.sire_owns.argtypes, sire.sire_owns.restype = [ctypes.c_void_p], ctypes.c_bool
context, region, addresses = ctypes.c_void_p(), ctypes.c_uint32(), [ctypes.c_uint64(), ctypes.c_uint64()]
assert driver.cuInit(0) == driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == driver.cuCtxSetCurrent(context) == 0
for address in addresses:
    assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(1 << 21)) == 0
    assert sire.sire_region_open(b"r", None, ctypes.byref(region)) == sire.sire_region_enter(region, 0) == 0
owned = [sire.sire_owns(address.value) for address in addresses]
assert owned == [False, True], owned
assert [driver.cuMemFree_v2(address) for address in addresses] == [0, 0]
"""
    settings = {"SIRE_SIM_MEMORY": "256MiB", "SIRE_SIM_POISON": "sample", "FORWARDS_TO": str(sim_dir / "libcuda.so.1")}
    settings |= {"SIRE_LIBCUDA": settings["FORWARDS_TO"], "LD_PRELOAD": f"{driver_so} {workshop.sire_so}"}
    environment = workshop.environment(loader.parent, **settings)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


SOFT_LINKS = """
import ctypes
class Library:
    def __init__(self, loaded, prefix):
        # A library that is loaded already, by its handle: a CDLL of its own, which looks its names up again.
        self.loaded, self.prefix = ctypes.CDLL(None, handle=loaded._handle), prefix
        self.loaded._handle = loaded._handle
    def get(self, name, *arguments):
        function = getattr(self.loaded, self.prefix + name, None)
        if function is None:
            return None
        address = ctypes.cast(ctypes.addressof(function), ctypes.POINTER(ctypes.c_void_p)).contents.value
        return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(address)

driver, sire = Library(ctypes.CDLL("libcuda.so.1"), "cu"), ctypes.CDLL("libsire_alloc.so")
sire.sire_owns.argtypes, sire.sire_owns.restype = [ctypes.c_void_p], ctypes.c_bool
pointer, size = ctypes.c_void_p, ctypes.c_size_t
alloc, free = driver.get("MemAlloc_v2", pointer, size), driver.get("MemFree_v2", pointer)
alloc_async, free_async = driver.get("MemAllocAsync", pointer, size, pointer), driver.get("MemFreeAsync", pointer, pointer)
set_current, retain = driver.get("CtxSetCurrent", pointer), driver.get("DevicePrimaryCtxRetain", pointer, ctypes.c_int)
assert driver.get("NoSuchThing") is None
context, region, addresses = pointer(), ctypes.c_uint32(), [pointer(), pointer()]
assert driver.get("Init", ctypes.c_uint)(0) == retain(ctypes.addressof(context), 0) == set_current(context) == 0
assert sire.sire_region_open(b"r", None, ctypes.byref(region)) == sire.sire_region_enter(region, 0) == 0
assert alloc(ctypes.addressof(addresses[0]), 1 << 21) == alloc_async(ctypes.addressof(addresses[1]), 1 << 21, None) == 0
assert sire.sire_region_leave(region) == 0 and all(sire.sire_owns(address.value) for address in addresses)
assert sire.sire_pause(b"r", None, None) == sire.sire_resume(b"r", None, None) == 0
assert free(addresses[0]) == free_async(addresses[1], None) == 0
"""


def test_soft_links(workshop: Workshop, sim_dir: Path, driver_so: Path) -> None:
    """CuPy's: the address that a function of ctypes holds, taken out and called by itself."""
    environment = workshop.environment(sim_dir, LD_PRELOAD=f"{driver_so} {workshop.sire_so}", SIRE_SIM_MEMORY="256MiB", SIRE_SIM_POISON="sample")
    done = subprocess.run([sys.executable, "-c", SOFT_LINKS], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


COMPILES = """
import ctypes, os, pathlib, subprocess, sys
compiler, source, folder, heard = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4] == "heard"

def folders_of_the_driver():
    if named := os.environ.get("TRITON_LIBCUDA_PATH"):
        return [named]
    known = []
    if os.path.exists("/sbin/ldconfig"):
        lines = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True, timeout=100).stdout.splitlines()
        known = [os.path.dirname(line.split()[-1]) for line in lines if "libcuda.so.1" in line]
    return known or [path for path in os.environ["LD_LIBRARY_PATH"].split(":") if os.path.exists(os.path.join(path, "libcuda.so.1"))]

def compiled(name):
    library = folder / f"{name}.so"
    options = [f"-L{path}" for path in folders_of_the_driver()]
    subprocess.run([compiler, source, "-O3", "-shared", "-fPIC", "-o", library, "-l:libcuda.so.1", *options, "-ldl"], check=True, timeout=100)
    return ctypes.CDLL(library)

sire = ctypes.CDLL("libsire_alloc.so")
sire.sire_owns.argtypes, sire.sire_owns.restype = [ctypes.c_void_p], ctypes.c_bool
region, scratch = ctypes.c_uint32(), [ctypes.c_ulonglong(), ctypes.c_ulonglong()]
assert sire.sire_region_open(b"r", ctypes.byref((ctypes.c_uint64 * 5)(40, 1, 0, 0, 0)), ctypes.byref(region)) == 0
launcher = compiled("launcher")
assert sire.sire_region_enter(region, 0) == 0
for looked_up, each in enumerate(scratch):
    assert launcher.launcher_scratch(looked_up, ctypes.byref(each), ctypes.c_size_t(1 << 21)) == 0
assert sire.sire_region_leave(region) == 0
assert [sire.sire_owns(each.value) for each in scratch] == [heard, heard]
# Compiled while the region's memory is there, and again after it was away.
for value in (7, 8):
    assert all(launcher.launcher_launch(each, value, ctypes.c_size_t(1 << 21)) == 0 for each in scratch)
    assert sire.sire_pause(b"r", None, None) == sire.sire_resume(b"r", None, None) == 0
    host = ctypes.create_string_buffer(1 << 21)
    copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoH_v2
    assert all(copy(host, each, ctypes.c_size_t(1 << 21)) == 0 and host.raw == bytes([value]) * (1 << 21) for each in scratch)
    launcher = compiled(f"again_{value}")
assert launcher.launcher_launch(ctypes.c_ulonglong(id(host)), 1, ctypes.c_size_t(1)) != 0
assert all(launcher.launcher_free(each) == 0 for each in scratch)
"""


@pytest.mark.parametrize("found_by", ["TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"])
@pytest.mark.parametrize("heard", ["heard", "deaf"])
def test_a_launcher_that_is_compiled_meanwhile(workshop: Workshop, sim_dir: Path, driver_so: Path, tmp_path: Path, found_by: str, heard: str) -> None:
    """Triton's way: the compiler runs as a child, with what is preloaded; the library links the driver where Triton has found it."""
    preload = f"{driver_so} {workshop.sire_so}" if heard == "heard" else str(workshop.sire_so)
    environment = workshop.environment(sim_dir, LD_PRELOAD=preload, SIRE_SIM_MEMORY="256MiB", SIRE_SIM_POISON="sample")
    if found_by == "TRITON_LIBCUDA_PATH":
        environment[found_by] = str(sim_dir)
    command = [sys.executable, "-c", COMPILES, COMPILER, str(FIXTURES / "launcher.c"), str(tmp_path), heard]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [["/bin/true"], ["/bin/sh", "-c", "/bin/echo hello; exit 3"], [sys.executable, "-c", "import ctypes, ssl, json; print(1)"]])
def test_harmless_in_programs_without_cuda(workshop: Workshop, driver_so: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not here")
    plain = subprocess.run(command, capture_output=True, text=True, env=workshop.environment(preload=False), timeout=300)
    environment = workshop.environment(LD_PRELOAD=f"{driver_so} {workshop.sire_so}", SIRE_DRIVER_DENY="/")
    loaded = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (loaded.returncode, loaded.stdout, loaded.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_the_exports_are_exactly_the_table(driver_so: Path) -> None:
    source = (ROOT / "crates" / "sire-driver-hooks" / "src" / "names.rs").read_text()
    table = set(re.findall(r"^ {12}(cu\w+)$", source, flags=re.M))
    assert len(table) > 30
    listing = subprocess.run(["nm", "-D", "--defined-only", str(driver_so)], check=True, capture_output=True, text=True, timeout=300).stdout
    assert {line.split()[-1] for line in listing.splitlines()} == table | {"dlsym"}
    # Each has an answer in the other library.
    answers = (ROOT / "cdylib" / "interpose" / "entry.rs").read_text()
    assert set(re.findall(r'= c"\w+"\s+as c"(\w+)"', answers)) == table
    page = (ROOT / "docs" / "driver-hooks.md").read_text()
    assert table | {"dlsym"} <= set(re.findall(r"`(\w+)`", page))


def test_it_needs_nothing_and_stays_loaded(driver_so: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", str(driver_so)], check=True, capture_output=True, text=True, timeout=300).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed, "readelf shows no NEEDED entry at all"
    assert all(re.match(r"(libc|libdl|libpthread|libgcc_s|ld-linux[-\w]*)\.so", name) for name in needed), needed
    assert "NODELETE" in dynamic
    assert "(VERDEF)" not in dynamic
