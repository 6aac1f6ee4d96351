"""Units: the tensors of one module that go on a device, into host memory and onto the disk together.

What `sire.memory` and `sire.slyce` have in common. From the bottom up: `readings` tells how full everything is; `disk`
keeps tensors in private files; `holding` moves tensors between devices under their own identity; `unit` is one
module's tensors and the tier they are in; `order` learns in which order units are used; `residency` decides who comes
and who goes; `gradients` keeps backward passes and optimizers right; `wrapping` makes a module bring its unit when it
is called. Each knows only those before it.
"""
