"""MediaWiki markup to plain text, construct by construct."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkroute.lab.data.markup import strip_markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a [[link]] here", "a link here"),
        ("a [[page|label]] here", "a label here"),
        ("a [[page|first|last]] here", "a last here"),
        ("two [[bus]]es", "two buses"),
        ("[[:Category:Moss]]", "Category:Moss"),
        ("a [[Category:Moss]]b", "a b"),
        ("[[de:Moose]]a", "a"),
        ("[[File:a.jpg|thumb|A [[link|label]] and [note] in it]]a", "a"),
        ("[[Image:a.jpg]]a", "a"),
        ("an [http://example.org/x example site] here", "an example site here"),
        ("an [http://example.org/x] here", "an  here"),
        ("a bare https://example.org/x?y=1 address", "a bare  address"),
        ("[sic] stays", "[sic] stays"),
        ("'''bold''', ''italic'', '''''both''''', don't", "bold, italic, both, don't"),
        ("a<ref>Smith</ref> b<ref name=x>Jones {{p|1}}</ref> c", "a b c"),
        ('a<ref name="x" /> b <ref name=y>Jones</ref>c', "a  b c"),
        ("a {{template|b={{inner|{{most}}}}}}c", "a c"),
        ("a\n{| class=wikitable\n|-\n| cell\n{|\n| nested\n|}\n|}\nb", "a\nb"),
        ("a\n|- \n| cell of a table that does not close\nb", "a\nb"),
        ("a<!-- hidden\n text -->b", "ab"),
        ("H<sub>2</sub>O, x<br/>y", "H2O, x y"),
        ("a <math>x < y</math> b", "a  b"),
        ("* one\n** two\n# three\n: four\n; five", "one\ntwo\nthree\nfour\nfive"),
        ("== Uses ==\ntext", "== Uses ==\ntext"),
        ("a\n----\nb__TOC__\n\n\nc", "a\nb\nc"),
        ("a&nbsp;b &ndash; c &amp; d", "a b – c & d"),
        ("x < y and y > z", "x < y and y > z"),
        ("", ""),
    ],
)
def test_markup_becomes_text(markup, text):
    assert strip_markup(markup) == text


@given(st.text(alphabet="a [](){}|<>/!-='&;:\n", max_size=80))
def test_any_text_gives_lines_that_are_not_blank(text):
    found = strip_markup(text)
    assert found == "" or all(line.strip() == line != "" for line in found.split("\n"))


@pytest.mark.parametrize("opening", ["{{", "{|", "[[", "<ref>", "<!--", "[http://", "[http://x ", "<", "=", "[", "'''"])
def test_markup_that_never_closes_does_not_take_cubic_time(opening):
    # A quarter of a second at most where a pattern looks ahead once from each start, many where from each place too.
    started = time.process_time()
    strip_markup(opening * 600)
    assert time.process_time() - started < 2
