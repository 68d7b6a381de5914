"""A plugin of pytest: Triton's interpreter before 3.7 takes NumPy from 2.4 on, as later ones do.

That NumPy makes no Python number of an array of one dimension. The interpreter asked it to where a kernel loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter


def _with_index(patch: Any) -> Any:
    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    return patched


if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
