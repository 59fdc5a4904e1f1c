"""The mechanisms, one file each: equations, loops, torch, the operation, the module, its record."""
