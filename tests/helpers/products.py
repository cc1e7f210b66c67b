"""What a call multiplies: its matrix products as the profiler saw them."""


def multiply_adds(profile):
    """Of all matrix products in a profile that was taken with `record_shapes`."""
    products = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    operands = [[shape for shape in shapes if len(shape) == 2][-2:] for shapes in products]
    return sum(a[0] * a[1] * b[1] for a, b in operands)
