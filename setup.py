"""Packages: ``unit_fast`` and its kernels. The folder ``kernels/`` is installed as ``unit_fast_kernels``.

A package called ``kernels`` would hide the Hugging Face package of that name, which transformers imports.
"""

from setuptools import find_packages, setup

KERNELS = ["unit_fast_kernels", *(f"unit_fast_kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=find_packages(include=["unit_fast", "unit_fast.*"]) + KERNELS,
    package_dir={"unit_fast_kernels": "kernels"},
    package_data={
        "unit_fast": ["report/templates/*"],
        "unit_fast_kernels": ["tuned/*.json", "assembly/budgets.json"],
    },
)
