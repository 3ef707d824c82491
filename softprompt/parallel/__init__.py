"""Many devices and several hosts: the mesh, and how arrays are divided over it."""
