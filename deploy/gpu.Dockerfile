# FastDeploy's server with the plug-in, on GPUs:
#   docker build -f deploy/gpu.Dockerfile -t fd_dsa:gpu .
#   docker run --rm --gpus all --ipc=host -p 127.0.0.1:8000:8000 -v /models:/models:ro fd_dsa:gpu \
#     /models/DeepSeek-V3.2-Exp-BF16 --tensor-parallel-size 8 -- --quantization block_wise_fp8
# Not built: see docs/operations.md.
FROM ccr-2vdh3abv-pub.cnc.bj.baidubce.com/paddlepaddle/fastdeploy-cuda-12.6:2.5.0

# the image has Paddle and FastDeploy, which this leaves as they are
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fd_dsa fd_dsa
RUN python -m pip install --no-cache-dir . 'triton>=3.3,<3.10' && rm -rf /src/*

# FastDeploy writes its log to the working directory
WORKDIR /var/log/fd_dsa
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["fd-dsa", "serve", "--engine", "fastdeploy", "--host", "0.0.0.0"]
