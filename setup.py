"""Packaging. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = {}
exec((ROOT / "qtuning_fast" / "version.py").read_text(), VERSION)

LIFELONG = [
    "accelerate>=1.0",
    "datasets>=3.0",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "pillow>=10",
    "rich>=13",
    "scikit-learn>=1.4",
    "typer>=0.15",
]
TEST = [
    "gguf>=0.10",
    "hypothesis>=6.100",
    "kernels>=0.10",
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "onnxscript>=0.5",
    "peft>=0.17",
    "pytest>=8.0",
    "pytest-benchmark>=5.0",
    "pytest-xdist>=3.5",
    "schemathesis>=4.0",
]
SERVE = ["jinja2>=3.1", "pydantic>=2.10", "python-multipart>=0.0.18", "ray[serve]>=2.60"]
LINT = ["import-linter>=2.3", "mypy>=1.15", "ruff>=0.9"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29"]

setup(
    name="qtuning_fast",
    version=VERSION["__version__"],
    description="Prompts inside attention, fast: Q-tuning's prompt queue and NoRGa's gate on one operator",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ and bench/ stand at the top of the repository and are subpackages of qtuning_fast. A wheel has the files
    # directly in bench/, which `qtuning-fast bench` needs, and not its folders. In a checkout qtuning_fast/kernels and
    # qtuning_fast/bench point there.
    packages=[
        *find_packages(
            include=["qtuning_fast", "qtuning_fast.*"], exclude=["qtuning_fast.kernels", "qtuning_fast.bench"]
        ),
        "qtuning_fast.kernels",
        "qtuning_fast.bench",
    ],
    package_dir={"qtuning_fast.kernels": "kernels", "qtuning_fast.bench": "bench"},
    package_data={
        "qtuning_fast": ["py.typed"],
        "qtuning_fast.attention": ["backend_order.json"],
        "qtuning_fast.kernels": ["blocks.json", "cpp/*"],
        "qtuning_fast.lifelong.report": ["*.html.j2"],
        "qtuning_fast.serving": ["*.html.j2"],
    },
    install_requires=[
        "cachetools>=5.3",
        "filelock>=3.12",
        "huggingface_hub>=1.33",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "torch>=2.11",
        "transformers>=5.17",
    ],
    extras_require={
        "lifelong": LIFELONG,
        "serve": SERVE,
        "triton": ["triton>=3.6; sys_platform == 'linux'"],
        "test": LIFELONG + SERVE + TEST,
        "dev": LIFELONG + SERVE + TEST + LINT,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["qtuning-fast = qtuning_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
