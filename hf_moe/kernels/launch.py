"""What every launch of a kernel says."""

# Products and sums that follow each other are fused, as before Triton 3.10; Triton 3.9 warns where nothing is said.
FUSED = {"enable_fp_fusion": True}
