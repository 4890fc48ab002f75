"""`pacevggt compare`: stock and accelerated side by side on the user's own clips, and how far apart they are.

In the order in which it runs:

    plan.py         what to run: options, clips, device; what does not fit is said before work starts
    runs.py         the runs: interleaved and timed, with what each gave
    differences.py  how far apart they are, and how far from the truth
    report.py       all of it as one dictionary, as a table and in a sentence
    clouds.py       the two point clouds, drawn alike
    pictures.py     the other pictures of the page
    page.py         report.html
    exports.py      PLY and COLMAP
    command.py      one after another: `compare`
    view.py         `pacevggt view`
"""

from .command import compare

__all__ = ["compare"]
