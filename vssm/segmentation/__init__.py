"""Training segmentation networks on volumes and pictures: data, plan, loop, export. Needs the `medical` extra."""
