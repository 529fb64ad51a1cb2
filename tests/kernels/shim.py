import inspect, functools
from unit_fast import ops
from unit_fast_kernels.shared.operator import OPERATORS, Operator
def make(op, impls):
    sig = inspect.signature(impls["reference"])
    names = [n for n in sig.parameters if n != "keep"]
    def validate(*args, **kw):
        b = sig.bind(*args, **kw); b.apply_defaults()
        return tuple(b.arguments[n] for n in names)
    def wrap(f):
        kwonly = [n for n, p in inspect.signature(f).parameters.items() if p.kind == p.KEYWORD_ONLY]
        if not kwonly: return f
        @functools.wraps(f)
        def g(*args, **k):
            a = dict(zip(names, args)); pos = [a[n] for n in names if n not in kwonly]
            return f(*pos, **{n: a[n] for n in kwonly}, **k)
        return g
    grad = op not in ("match_cost", "assignment")
    Operator(name=op, validate=validate, **{k: wrap(v) for k, v in impls.items()}, grad=grad)
if not OPERATORS:
    for op, impls in ops._IMPLEMENTATIONS.items():
        if op != "giou": make(op, impls)
