"""A pool of ones own, and a user of it: two slots of an imaginary accelerator, and things that want one."""

import sire


class Slots(sire.ResourcePool):
    """A pool that counts slots where others count bytes."""

    def get_pool_total_size(self):
        return 2

    def get_device_free_size(self):
        return 2 - self.get_pool_used_size()


class Thing:
    """Something that needs a slot while it is used."""

    def __init__(self, name):
        self.name = name


class ThingUser(sire.BaseResourcePoolUser):
    """Says how a thing comes and goes."""

    held = 0

    def on_setup(self, manager):
        return [manager.get_resource_pool("xla")]

    def get_runtime_device(self):
        return "xla"

    def get_used_resource_size(self, device):
        return self.held

    def get_needed_resource_size(self):
        return 1 - self.held

    def on_load(self):
        if not self.held:
            order.append(f"load {self.manage_object.name}")
        self.held = 1

    def on_offload(self, release):
        """It stays until somebody needs its slot."""

    def on_resource_request(self, device, size):
        order.append(f"drop {self.manage_object.name}")
        self.held = 0


order: list[str] = []
sire.get_resource_management().set_resource_pool("xla", Slots("xla"))
sire.AutoManageWrapper.register_type_wrapper(Thing, ThingUser)
a, b, c = (Thing(name) for name in "abc")
for thing in (a, b, c, a):
    with sire.auto_manage(thing):
        pass
print(", ".join(order))
