"""Go's template language as far as Modelfiles need it; expected texts are what Go's text/template documents."""

import pytest

from qtune.export.gguf.go_template import GoTemplateError, evaluate, quoted

VALUES = {
    "System": "S",
    "Empty": "",
    "Messages": [{"Role": "user", "Content": "U"}, {"Role": "assistant", "Content": "A"}],
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain { text } }}", "plain { text } }}"),
        ("<{{ .System }}>", "<S>"),
        ("{{if .System}}a{{else}}b{{end}}", "a"),
        ("{{ if .Empty }}a{{ else }}b{{ end }}", "b"),
        ("{{ if .Empty }}a{{ end }}", ""),
        ("{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}", "[user:U][assistant:A]"),
        ('{{ range .Messages }}{{ if eq .Role "user" }}u{{ else if eq .Role "assistant" }}a{{ end }}{{ end }}', "ua"),
        ("{{ range .Messages }}{{ $.System }}{{ end }}", "SS"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ end }}", "01"),
        ("{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}last{{ end }}{{ end }}", "last"),
        ('{{ if and .System (eq "a" "b" "a") }}yes{{ end }}{{ if and .Empty .System }}no{{ end }}', "yes"),
        # From the package documentation, "Text and spaces".
        ('{{ "23" -}} < {{- "45" }}', "23<45"),
        ('a \n{{- "b" }} c', "ab c"),
        ("a {{/**/ -}} b".replace("/**/ ", '"" '), "a b"),
        ('{{ "{{" }} x }}', "{{ x }}"),
        ('{{ "a\\nb" }}', "a\nb"),
    ],
)
def test_templates_give_what_go_gives(template: str, expected: str) -> None:
    assert evaluate(template, VALUES) == expected


@pytest.mark.parametrize("text", ["plain", "{{ .System }}", "a {{- b", "}} {{ {{", '"quotes"', "  spaces \n"])
def test_quoted_text_comes_out_as_it_is(text: str) -> None:
    assert evaluate(quoted(text), VALUES) == text


@pytest.mark.parametrize(
    "template", ["{{ .System | upper }}", "{{ if .System }}", "{{ with .System }}", "{{ upper .System }}"]
)
def test_what_is_not_known_is_refused(template: str) -> None:
    with pytest.raises(GoTemplateError):
        evaluate(template, VALUES)
