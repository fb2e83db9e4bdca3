"""fedseg: hospitals train one 3D segmentation network together, and no volume leaves its hospital."""

__version__ = "0.1.0.dev0"
