"""Kernels of this package on Triton before 3.7, and those of others beside them."""

import types

import pytest

from dspark_kernels import library


class _Old:
    """What Triton before 3.7 does with an operand of a comparison."""

    def __call__(self, value):
        from triton.language import core

        if isinstance(value, core.tuple):
            return core.tuple([self(element) for element in value.values])  # no type given: that of the elements, a None has none
        return value.value if isinstance(value, core.constexpr) else value


@pytest.fixture
def old_triton(monkeypatch):
    """Triton's frontend before 3.7, given back afterwards."""
    pytest.importorskip("triton")
    from triton.compiler import code_generator

    monkeypatch.setattr(code_generator, "_unwrap_if_constexpr", _Old())
    monkeypatch.setattr(code_generator.CodeGenerator, "visit", code_generator.CodeGenerator.visit)
    return code_generator


def _compares_a_tuple(out_ptr):
    pair = (out_ptr, None)
    if pair is None:
        pass


def _calls_another(out_ptr):
    _CALLED(out_ptr)  # noqa: F821 -- _kernel_of gives it


def _kernel_of(module, function, **names):
    """The function as a kernel of a module with that name; names: what else it sees."""
    from triton.runtime.jit import JITFunction

    own = types.FunctionType(function.__code__, function.__globals__ | names)
    own.__module__ = module
    return JITFunction(own)


def _compile(kernel):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compiler

    source = ASTSource(kernel, {"out_ptr": "*i32"}, {})
    target = GPUTarget("cuda", 80, 32)
    backend = compiler.make_backend(target)
    options = backend.parse_options({})
    context = compiler.ir.context()
    compiler.ir.load_dialects(context)
    backend.load_dialects(context)
    return source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def test_tuples_with_a_none_can_be_compared_on_old_tritons(old_triton):
    ours = _kernel_of("dspark_kernels.kernels.stand_in", _compares_a_tuple)
    with pytest.raises(Exception, match="has no attribute 'type'"):
        _compile(ours)
    library.patch_tuples()
    _compile(ours)
    patched = old_triton._unwrap_if_constexpr, old_triton.CodeGenerator.visit
    library.patch_tuples()
    assert (old_triton._unwrap_if_constexpr, old_triton.CodeGenerator.visit) == patched, "patched twice"


@pytest.mark.parametrize("module", ["others", "dspark_kernels_of_others.kernels"])
def test_kernels_of_others_compile_as_before_on_old_tritons(old_triton, module):
    """Even where one of ours calls them, and where one of them calls ours."""
    theirs, ours = (_kernel_of(name, _compares_a_tuple) for name in (module, "dspark_kernels.kernels.stand_in"))
    library.patch_tuples()
    for kernel in (theirs, _kernel_of("dspark_kernels.kernels.stand_in", _calls_another, _CALLED=theirs)):
        with pytest.raises(Exception) as caught:
            _compile(kernel)
        assert "has no attribute 'type'" in str(caught.value.__cause__ or caught.value)
    _compile(_kernel_of(module, _calls_another, _CALLED=ours))


def test_new_tritons_are_not_patched():
    pytest.importorskip("triton")
    from triton.compiler import code_generator
    from triton.language import core

    try:
        core._unwrap_if_constexpr(core.tuple([core.constexpr(None)]))
    except AttributeError:
        pytest.skip("this Triton is old")
    library.patch_tuples()
    assert code_generator._unwrap_if_constexpr is core._unwrap_if_constexpr


def test_a_record_of_functions_names_their_source():
    """Triton's disk cache would otherwise know them by name, and keep a binary whose functions have changed."""
    from dspark_kernels.kernels.draft import args, heads

    class Function:
        cache_key = "digest of the source"

    kind = heads.HeadKind(latent=Function(), parts=1, widen=Function(), dot_type="bf16", mix_type="fp32")
    assert kind.cache_key == "digest of the source-1-digest of the source-bf16-fp32"
    assert args.WalkOptions(Function(), *range(len(args.WalkOptions._fields) - 1)).cache_key.startswith("digest of the source-0-1")
