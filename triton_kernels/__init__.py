"""Triton kernels, installed as llmkern.triton_kernels.

OpenAI publishes a top-level package of this folder's name, and others probe for it. With the repository
root on sys.path this folder must not answer for it.
"""

if __name__ != "llmkern.triton_kernels":
    raise ModuleNotFoundError(
        f"No module named {__name__!r}; the kernels of llmkern are llmkern.triton_kernels",
        name=__name__,
    )
