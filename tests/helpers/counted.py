"""What a call multiplies, and what autograd keeps of it for a backward, counted."""

import torch


def multiply_adds(profile):
    """Of all matrix products in a profile that was taken with `record_shapes`."""
    products = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    operands = [[shape for shape in shapes if len(shape) == 2][-2:] for shapes in products]
    return sum(a[0] * a[1] * b[1] for a, b in operands)


class SavedBytes:
    """Bytes of the distinct storages that autograd saves inside the context, apart from those of `known` tensors."""

    def __init__(self, known):
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.storages = {}

    def __enter__(self):
        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.known:
                # Held, so that no address comes twice; detached, so that no graph holds itself by it.
                self.storages[storage.data_ptr()] = (storage.nbytes(), t.detach())
            return t

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def bytes(self):
        return sum(size for size, _ in self.storages.values())
