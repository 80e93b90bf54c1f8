"""What a real installation of FastDeploy shows: is it up, are its tokens right, is it faster."""
