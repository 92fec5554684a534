import pytest

from common import new_paper


def test_a_second_paper_of_the_same_name_is_refused(tmp_path):
    new_paper.scaffold("demo_paper", tmp_path)
    with pytest.raises(FileExistsError, match=r"papers/demo_paper/README\.md"):
        new_paper.scaffold("demo_paper", tmp_path)


@pytest.mark.parametrize("slug", ["Demo", "2fast", "a-b", "", "a/b", "../x"])
def test_a_slug_is_a_module_name(tmp_path, slug):
    with pytest.raises(ValueError, match="Python module name"):
        new_paper.scaffold(slug, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_trace_of_the_template_is_left(tmp_path):
    for path in new_paper.scaffold("demo_paper", tmp_path):
        assert "SLUG" not in path.read_text()
        assert not path.name.endswith(".template")
