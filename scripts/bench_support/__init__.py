"""What scripts/bench is made of. Programs in benches/ do the measuring; here they are built, started in turn, and judged.

`figures` knows what a figure is and when it may be judged; `workshop` builds programs and says where they run; `peer` finds the published
torch_memory_saver; `child` talks to one running program; the `*_figures` modules measure; `report` and `picture` show.
"""
