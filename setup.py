from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

here = Path(__file__).parent
version = next(line.split('"')[1] for line in (here / "oneshot/__init__.py").read_text().splitlines()
               if line.startswith("__version__"))

setup(
    name="oneshot",
    version=version,
    description="Prune a language model once, prove what it cost, run it faster",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",  # `make pythons` tries the oldest and the newest
    # folders of oneshot need no __init__.py
    packages=[*find_namespace_packages(include=["oneshot", "oneshot.*"], exclude=["*.__pycache__", "oneshot.demo.*"]),
              *find_packages("kernels")],
    # `kernels` is a source root, not a package: a well-known package of that name is on PyPI
    package_dir={"oneshot_kernels": "kernels/oneshot_kernels"},
    package_data={"oneshot.demo": ["*.md", "*.txt", "model/*"], "oneshot.report": ["*.j2", "*.css"],
                  "oneshot_kernels.cpu": ["*.cpp", "*.h"]},
    entry_points={"console_scripts": ["oneshot = oneshot.__main__:main"]},
    install_requires=[
        "torch>=2.9",
        "transformers>=5.14",
        "safetensors>=0.5",
        "numpy",
        "datasets>=4",
        "tqdm",
        "matplotlib",
        "jinja2>=3.1",
        'triton>=3.5; platform_system == "Linux"',
    ],
    extras_require={
        "eval": ["lm-eval>=0.4.13", "accelerate"],
        "heal": ["accelerate", "peft"],
        "offload": ["accelerate"],
        "gguf": ["gguf>=0.19"],
        "compressed": ["compressed-tensors>=0.15"],
        "dev": ["pytest>=8", "pytest-xdist", "ruff", "hypothesis", "zstandard",
                'xllamacpp; platform_system == "Linux" and platform_machine == "x86_64"'],
    },
)
