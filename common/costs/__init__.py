"""What inference costs: the roofline of a transformer, idealized runtime, dollars per correct answer, saturation.

Instruments that every paper's result is judged with. They stand beside common/metrics and common/serving, which they
build on, and not inside: most stages of the pipeline depend on those two as folders, and would run again for an
instrument that they do not use.
"""
