"""``import torch_memory_saver`` reaches Sire: this module replaces itself by `sire.torch_memory_saver`.

It is for programs, and workers that they spawn, to which no line can be added. It takes the place of the
distribution torch-memory-saver; the two cannot be installed together.
"""

__sire_compat__ = True

import sire.compat

sire.compat.enable()
