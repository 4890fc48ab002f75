"""`pacevggt evaluate`: stock beside accelerated on every scene of a data set, against its ground truth.

In the order in which it runs:

    plan.py       what to run: options, scenes, frames; what does not fit is said before a model is loaded
    protocols.py  which frames, and what is measured on a scene
    results.py    a JSON for each scene, and the settings that they were made with
    runs.py       the runs on one scene
    summary.py    means and changes over scenes, as JSON, Markdown and a table
    picture.py    the picture of them
    command.py    one after another: `evaluate`
"""

from .command import evaluate

__all__ = ["evaluate"]
