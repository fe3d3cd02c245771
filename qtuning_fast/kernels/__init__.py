"""The Triton kernels. In a checkout their files are in kernels/ at its top; a wheel has them here, without this file.

The folder at the top must not be a package of its own: the name `kernels` belongs to another project.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
