"""PTX emulator for the kernel tests, and the memory report that runs on it."""
