"""A stand-in for DeepSpeed's ZeRO-3 on one process, with the same marks on parameters and modules.

Between calls parameters are empty and have ``ds_id`` and ``ds_shape``. A hook on each module gathers for its calls, and
for its backward, what the module holds itself and what its ``ds_external_parameters`` names.
"""

import contextlib
import sys
import types

import torch


class ZeRO3:
    """`model` with partitioned parameters; what is added to it later stays as it is. Stands for ``deepspeed.zero``."""

    def __init__(self, model, hooks=True):
        self.numbers = {}  # by ds_id
        for parameter in model.parameters():
            parameter.ds_id, parameter.ds_shape = len(self.numbers), parameter.shape
            self.numbers[parameter.ds_id] = parameter.detach().clone()
            self._release([parameter])
        if hooks:
            for module in model.modules():
                self._hook(module)

    def _hook(self, module):
        if not hasattr(module, "_external_params"):
            module._external_params = {}
            module.ds_external_parameters = types.MethodType(lambda self: self._external_params.items(), module)

        def gather(module, *_):
            self.gather(self._of(module))

        def release(module, *_):
            self._release(self._of(module))

        gather.__module__ = release.__module__ = "deepspeed.runtime.zero.parameter_offload"
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)

    @staticmethod
    def _of(module):
        return [p for _, p in (*module.named_parameters(recurse=False), *module.ds_external_parameters())]

    def gather(self, parameters):
        for parameter in parameters:
            if parameter.numel() == 0:
                parameter.data = self.numbers[parameter.ds_id].clone()

    def _release(self, parameters):
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    @contextlib.contextmanager
    def GatheredParameters(self, params, modifier_rank=None):
        params = list(params)
        self.gather(params)
        for parameter in params:
            parameter._gathered_by_the_user = 1
        yield
        for parameter in params:
            del parameter._gathered_by_the_user
        for parameter in params if modifier_rank is not None else ():
            self.numbers[parameter.ds_id] = parameter.detach().clone()
        self._release(params)


def partitioned(model, monkeypatch, hooks=True):
    """The stand-in that holds the numbers of `model` from now on; without `hooks` as after ``deepspeed.zero.Init``."""
    zero = ZeRO3(model, hooks)
    internal = types.SimpleNamespace(DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR="_gathered_by_the_user")
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.partition_parameters", internal)
    return zero
