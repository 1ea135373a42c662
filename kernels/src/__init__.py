"""Triton kernels and their launchers, imported as `blipfast.kernels`; needs torch and triton only.

Nothing is imported here: `blipfast/ops/<op>.py` imports `blipfast.kernels.<op>` on first use, so
that a machine without Triton can import everything else.
"""

if __name__ != "blipfast.kernels":
    raise ImportError(
        f"blipfast's kernels were imported as {__name__!r}; import them as 'blipfast.kernels' "
        "(with blipfast installed: pip install -e .)"
    )
