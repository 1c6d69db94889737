"""Kernels written for a GPU, one file each, where torch's operations pass over memory several times.

Each file imports Triton, and is imported when it is needed: by the formula in torch that it is tested against, to the
bit, by Triton's interpreter or on a GPU.
"""
