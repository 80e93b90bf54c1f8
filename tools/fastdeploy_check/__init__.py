"""Checks of a FastDeploy installation: is it up, are its tokens right, is it faster."""
