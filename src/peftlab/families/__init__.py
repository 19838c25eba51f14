"""The families of peftlab, one file each; the folder is the registry."""
