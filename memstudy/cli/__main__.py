from memstudy.cli.main import main

main()
