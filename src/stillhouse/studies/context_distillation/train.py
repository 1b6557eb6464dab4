"""Step program: train one student, or the task's LoRA teacher, and keep its checkpoints.

The condition's settings decide what is distilled; the loop is the shared one. Resumable state lies in
`work/<fingerprint>/`, and the output directory appears whole when the last step is done.
"""

from __future__ import annotations
