"""`guest` by its former place."""

from ..patching.guest import guest as guest
