"""Stillhouse: reproducible language-model distillation studies, from data sets and models to figures."""

import logging

# transformers imports torchao wherever it is installed; what torchao says of GPU kernels that this machine lacks would
# stand at the head of every log.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
