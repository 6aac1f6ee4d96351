"""Where that package keeps its hook modes; Sire's are in `sire._hooks`."""
