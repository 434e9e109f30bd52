from chirrop import main

raise SystemExit(main())
