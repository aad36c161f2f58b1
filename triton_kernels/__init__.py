"""The model's operations, one a file: an oracle in plain PyTorch and, where there is one, a Triton kernel."""

if __name__ != "fastsam_rwkv.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'fastsam_rwkv.triton_kernels', "
        "since a second copy would register every operator twice"
    )
