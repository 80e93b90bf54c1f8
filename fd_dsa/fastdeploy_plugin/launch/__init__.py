"""FastDeploy's own server as a child process. Nothing below imports FastDeploy."""
