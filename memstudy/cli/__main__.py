from memstudy.cli.main import app

app(prog_name="memstudy")
