"""Operators of the model, one per file: a reference in plain PyTorch and Triton kernels."""

if __name__ != "fastsam_rwkv.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'fastsam_rwkv.triton_kernels', "
        "since a second copy would register every operator twice"
    )
