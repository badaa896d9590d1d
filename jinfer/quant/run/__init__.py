"""A quantization from a checkpoint to a folder, its report, and the examination of folders."""
