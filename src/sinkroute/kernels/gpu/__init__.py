"""The Triton kernels. Triton comes with torch for GPUs only: import these modules where a GPU is at work."""
