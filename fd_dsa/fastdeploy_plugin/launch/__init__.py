"""FastDeploy's own server with our plug-in in it. Nothing below imports FastDeploy."""
