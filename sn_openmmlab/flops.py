"""FLOPs of SN in mmengine's complexity analysis, which counts norm layers by the operators that torch has for them."""

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter


def register() -> None:
    """Count what SN takes its variances by as mmengine counts the other norms, 5 an element.

    In a trace this is ``var_mean`` in training mode, and ``square`` in evaluation.
    """
    for operator in 'aten::var_mean', 'aten::square':
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(operator, elementwise_flop_counter(5))
