#!/usr/bin/env bash
# Typeset report/main.tex into build/report.pdf; find or install a TeX engine first.
#
# usage: report/tex.sh [GENERATED]
#   GENERATED  the folder with figures/ and report/{studies.tex,tables/,values/}, absolute or
#              relative to the repository root; the repository itself unless given
# exit status: 0 the PDF is there, 1 TeX found an error, 3 no TeX engine could be had
set -euo pipefail
cd "$(dirname "$0")"

out=../build/tex
pdf=../build/report.pdf
generated=${1:-.}
apt_packages=(latexmk texlive-latex-recommended lmodern)

say() { printf 'report: %s\n' "$*"; }

missing() {  # the TeX programs and files that main.tex needs and that are not installed
    local name
    for name in latexmk pdflatex bibtex; do
        command -v "$name" >/dev/null || echo "$name"
    done
    command -v kpsewhich >/dev/null || return 0
    for name in plainnat.bst $(sed -n 's/^\\RequirePackage.*{\(.*\)}$/\1.sty/p' memstudy.sty); do
        kpsewhich "$name" >/dev/null || echo "$name"
    done
}

apt_install() {
    local as_root=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n)
    fi
    say "no complete TeX here; installing it with apt-get (about half a minute, 200 MB;" \
        "log: build/tex/apt.log)"
    "${as_root[@]}" apt-get update >"$out/apt.log" 2>&1 || true  # one broken source need not matter
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${apt_packages[@]}" >>"$out/apt.log" 2>&1 ||
        { say "apt-get failed: $(grep '^E:' "$out/apt.log" | head -n 1)"; return 1; }
}

rm -rf "$out" "$pdf"  # an old PDF must not pass for this one
mkdir -p "$out"
case $generated in
    /*) ;;
    *) generated=../$generated ;;
esac
printf '\\newcommand{\\generated}{%s}\n' "$generated" >"$out/generated.tex"

if [ -z "$(missing)" ] || { apt_install && [ -z "$(missing)" ]; }; then
    engine=(env "TEXINPUTS=$out:" max_print_line=1000 latexmk -pdf -silent -interaction=nonstopmode -halt-on-error
            -file-line-error "-outdir=$out" main.tex)
elif command -v tectonic >/dev/null; then
    engine=(tectonic --keep-logs -Z "search-path=$out" --outdir "$out" main.tex)
else
    say "error: no PDF, because TeX is missing ($(missing | paste -sd ' ')) and could not be" \
        "installed. Install it, then run the same command again. Debian, Ubuntu:" \
        "sudo apt-get install ${apt_packages[*]}. Elsewhere: TeX Live, or tectonic." >&2
    exit 3
fi

say "typesetting (about ten seconds; log: build/tex/main.log)"
if ! "${engine[@]}" >"$out/engine.log" 2>&1; then
    say "error: TeX stopped" >&2
    grep -E -m 1 -A 2 '^(!|[^ ]+:[0-9]+: )' "$out/main.log" >&2 || tail -n 20 "$out/engine.log" >&2
    exit 1
fi
grep -E '(Citation|Reference) .* undefined|^Overfull .hbox \([0-9]{2,}' "$out/main.log" |
    sort -u | sed 's/^/report: warning: /' || true
mv "$out/main.pdf" "$pdf"
say "done: build/report.pdf"
