"""FastDeploy's Triton kernels; the double has their wrapper alone."""
